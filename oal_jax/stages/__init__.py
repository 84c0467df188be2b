"""The stages of a run, one file each; `pipeline.py` says which run, in what order, on what."""
