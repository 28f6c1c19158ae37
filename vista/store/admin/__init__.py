"""What an operator does with a store: publish, roll back, copy, compact, inspect, export, import."""
