"""What papers claim, in miniature: each file measures one paper's claims on toys, and says what would be holding."""
