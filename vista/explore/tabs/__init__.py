"""The tabs of the page: widgets and charts of Streamlit, without computations of their own."""
