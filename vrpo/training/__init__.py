"""The trainers, their configuration, and what they share."""
