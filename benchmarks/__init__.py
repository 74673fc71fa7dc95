"""FastSAM's benchmarks: ``pytest benchmarks/ --benchmark``; how to read them: NOTES.md."""
