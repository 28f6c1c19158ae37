"""`vista explore`: a page in the browser. Modules that need no browser compute what tabs.py shows."""
