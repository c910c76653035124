"""Local: neighbourhoods."""
