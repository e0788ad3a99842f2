"""`lipcert predict`: from image files and folders to a table of answers, through a server or in this process."""
