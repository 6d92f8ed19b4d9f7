"""Small models and data to begin with, made or got from packages: no network address is named here."""
