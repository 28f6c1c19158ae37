"""`vista explore`: a page in the browser. Modules that need no browser compute what tabs.py shows."""

from vista.installation import require_module

for _package in ("altair", "pandas", "streamlit"):
    require_module(_package, "explore")
