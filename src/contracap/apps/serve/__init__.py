"""The model over HTTP: requests that arrive together go through it together."""
