;; Random bytes come in any number, none included, and two draws differ.
(module
  (import "wasi_snapshot_preview1" "random_get" (func $random_get (param i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "proc_exit" (func $proc_exit (param i32)))
  (memory (export "memory") 2)
  (func $must (param $holds i32) (param $code i32)
    (if (i32.eqz (local.get $holds)) (then (call $proc_exit (local.get $code)))))
  (func (export "_start")
    (call $must (i32.eqz (call $random_get (i32.const 0) (i32.const 0))) (i32.const 1))
    (call $must (i32.eqz (call $random_get (i32.const 64) (i32.const 16))) (i32.const 2))
    (call $must (i32.eqz (call $random_get (i32.const 80) (i32.const 16))) (i32.const 3))
    (call $must (i64.ne (i64.load (i32.const 64)) (i64.load (i32.const 80))) (i32.const 4))
    (call $must (i32.eqz (call $random_get (i32.const 1024) (i32.const 65536))) (i32.const 5))))
