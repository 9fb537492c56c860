from gemma2_stream.cli import main

raise SystemExit(main())
