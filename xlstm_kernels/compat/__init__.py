"""One file per library that we stand in for."""
