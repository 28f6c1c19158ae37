"""`vista explore`: a page in the browser. What it shows is computed in modules that need no browser; tabs/ shows it."""

from vista.installation import require_module

for _package in ("altair", "pandas", "streamlit"):
    require_module(_package, "explore")
