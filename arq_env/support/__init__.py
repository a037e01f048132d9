"""What every room uses: files, errors, provenance, tables and pictures for people."""
