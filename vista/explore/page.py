"""The script that Streamlit runs for each session; its argument is an `ExploreConfig` as JSON.

The title is drawn before anything else is imported, so that it shows at once.
"""

from __future__ import annotations

import json
import sys

import streamlit as st

CSS = """
.stMainBlockContainer {padding-top: 2.2rem; padding-bottom: 3rem; max-width: 1500px;}
h1 {font-size: 1.9rem !important; padding: 0 !important; letter-spacing: -0.01em;}
h4 {padding: 0.4rem 0 0.35rem 0 !important; font-size: 1.15rem !important;}
[data-testid="stSidebar"] {min-width: 250px !important; width: 250px !important;}
[data-testid="stButtonGroup"] button {min-height: 2.5rem;}
[data-testid="stMetric"] {background: #f6f8fa; border-radius: 10px; padding: 0.65rem 0.9rem;}
[data-testid="stMetricValue"] {font-size: 1.45rem; font-weight: 600;}
[data-testid="stSidebarContent"] .stButton button {justify-content: flex-start;}
"""

st.set_page_config(page_title="vista explore", layout="wide", initial_sidebar_state="expanded")
st.html(f"<style>{CSS}</style>")
st.title("vista explore")

from vista.config import ExploreConfig  # noqa: E402
from vista.explore.page_body import show_page  # noqa: E402

show_page(ExploreConfig(**json.loads(sys.argv[1])))
