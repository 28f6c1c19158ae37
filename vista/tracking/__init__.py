"""Experiment tracking: sends the metrics, settings, model card, and plots of a run to a tracker."""
