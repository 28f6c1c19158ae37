"""`vista explore`: a page in the browser. What it shows is computed in modules that need no browser; tabs/ shows it."""
