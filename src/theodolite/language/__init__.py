"""Language models behind one client."""
