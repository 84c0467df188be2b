"""Training methods: one file each; every one is a `Method` that the one loop trains."""
