"""What a quantization did and what it cost: squawq_report.json, and report.html for people."""
