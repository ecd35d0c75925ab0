"""What a run says at its end: report.json, the page and its charts."""
