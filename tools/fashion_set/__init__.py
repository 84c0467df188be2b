"""Makes the embedded image sets and weights; no user of the package runs it."""
