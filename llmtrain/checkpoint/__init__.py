"""Training state on disk: written aside, hashed, renamed into place; read back only if whole."""
