"""The settings of the simulation: how events come about, and what decides a click."""
