"""Students that are not hybrids: smaller, merged, recurrent; and which to choose."""
