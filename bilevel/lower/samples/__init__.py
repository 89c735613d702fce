"""Samples of both levels, and the derivatives of the objectives on them that stochastic methods ask for."""
