"""What one rank owns of a served model: layers, a slice of them, experts."""
