"""Image sets: what they are (benchmarks), how they are read (sources, bundled) and made (build)."""
