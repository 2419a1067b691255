"""`python -m reverie_jax.cli`."""

from reverie_jax.cli import main

main()
