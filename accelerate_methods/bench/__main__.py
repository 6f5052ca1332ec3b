from accelerate_methods.bench.cli import main

raise SystemExit(main())
