"""Trains several methods under one budget (`runner`) and writes down how they compare (`report`)."""
