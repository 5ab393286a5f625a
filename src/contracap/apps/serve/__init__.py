"""The model behind HTTP: requests that arrive together go through it together."""
