"""What every room needs, and nothing that knows a method."""
