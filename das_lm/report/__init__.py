"""What people look at: tables, comparison, figures, page, card."""
