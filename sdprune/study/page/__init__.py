"""The page that shows runs: its template, style and script, and what Python prepares for them."""
