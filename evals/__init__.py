"""Evaluation and benchmarks of the project and its peers. Results are JSON files in results/."""
