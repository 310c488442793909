"""What a backbone shows: its blocks, and the tokens that they give."""
