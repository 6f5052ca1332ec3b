"""``python -m accelerate_methods.report RESULTS... --output DIR``: accuracy and cost as one page.

``results`` reads what runs left behind, ``sections`` puts together what may be compared, ``statistics`` has the
arithmetic, ``tables`` the numbers as CSV and Markdown, ``figures``, ``overlays`` and ``page`` the HTML.
"""
