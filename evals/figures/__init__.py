"""Makes this repository's own figures, in a checkout: `minrnn figures NAME`. Not part of a wheel."""
