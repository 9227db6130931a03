"""From single runs to studies: many cells by one command."""
