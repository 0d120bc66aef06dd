"""Which tokens are masked and what they weigh: integers and fp64, no model."""
