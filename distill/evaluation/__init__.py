"""What is measured of a student beside its teacher."""
