"""Rules of operators that resample images. Notation as in `rules`."""
