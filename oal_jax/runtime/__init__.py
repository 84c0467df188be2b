"""The process and its devices, no machine learning."""
