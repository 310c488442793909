"""What the student is compared with."""
