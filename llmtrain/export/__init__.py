"""A trained model as others take it: merged, cast, described."""
