"""The formats in which data sets say what is in their images, a module for each."""
