"""How good and how fast: what this project measures of itself and of its peers. Results are JSON files in results/."""
