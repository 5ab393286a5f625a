"""The formats in which data sets say what is in their pictures, a module for each."""
