"""HTTP/1.1 connections: uvicorn's protocol with limits, deadlines and constant refusals."""
