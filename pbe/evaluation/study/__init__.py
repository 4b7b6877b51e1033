"""The human study: a page that raters rank edits on, and the tables made of their rankings."""
