package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"strings"
	"time"
)

// Limits of a call.
const (
	// callLimit bounds every call: after a restart of dockerd Docker itself has no
	// timeout, and a hung call then blocks its start for ever.
	callLimit = 10 * time.Second
	// answerMargin is what is left of it for the answer: a call that keeps its own
	// deadline can still say what it waited for.
	answerMargin = 500 * time.Millisecond
	// bodyLimit bounds a request; the largest real ones are a few kB.
	bodyLimit = 1 << 20
	// readLimit bounds how long a request may take to arrive.
	readLimit = 5 * time.Second
	// drainLimit is how long calls in flight may go on after SIGTERM. Docker kills
	// after 10 s.
	drainLimit = 5 * time.Second

	contentType = "application/vnd.docker.plugins.v1.2+json"
)

// errorReply is how Docker reads a failure. With status 200 the user sees the
// text alone ("remote: …"). Of the IpamDriver's answers Docker reads another field
// (moby daemon/libnetwork/ipams/remote/api), so both hold the text.
type errorReply struct {
	Err   string
	Error string
}

func failure(text string) errorReply { return errorReply{text, text} }

// server answers Docker's calls. It owns no state; the gate holds what serves.
type server struct {
	gate    *gate
	metrics *metrics
	log     *slog.Logger
	limit   time.Duration // of a call; callLimit outside tests
	journal *journal
}

// call is one entry of the route table: it decodes, waits for the services if it
// needs them and runs. A *requestError means that the request itself is bad.
type call struct {
	method string // "NetworkDriver.Join"
	noBody bool   // Docker sends none
	serve  func(ctx context.Context, g *gate, body []byte) (any, error)
}

// requestError is the fault of whoever sent the request, with the HTTP status.
type requestError struct {
	status int
	text   string
}

func (e *requestError) Error() string { return e.text }

// handler returns the mux of all routes.
func (s *server) handler(calls []call) http.Handler {
	mux := http.NewServeMux()
	for _, c := range calls {
		mux.HandleFunc("/"+c.method, func(w http.ResponseWriter, r *http.Request) { s.handle(c, w, r) })
	}
	mux.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) {
		text := fmt.Sprintf("this version of weft does not know %.100q", strings.TrimPrefix(r.URL.Path, "/"))
		s.log.Info("call of an unknown method", "path", r.URL.Path[:min(len(r.URL.Path), 100)])
		writeJSON(w, http.StatusNotFound, failure(text))
	})
	return mux
}

// handle serves one call: it is the only place where an error becomes an answer.
func (s *server) handle(c call, w http.ResponseWriter, r *http.Request) {
	start := time.Now()
	s.metrics.inFlight.Inc()
	defer s.metrics.inFlight.Dec()
	body, err := readBody(c, w, r)
	var reply any = struct{}{}
	if err == nil {
		reply, err = s.run(r.Context(), c, body)
	}
	took := time.Since(start)
	s.metrics.observe(c.method, err, took)
	if err == nil {
		writeJSON(w, http.StatusOK, reply)
		return
	}
	s.log.Error("call failed", "method", c.method, "id", requestID(body), "took", took.Round(time.Millisecond), "err", err)
	status := http.StatusOK
	var bad *requestError
	if errors.As(err, &bad) {
		status = bad.status
	}
	writeJSON(w, status, failure(err.Error()))
}

// run calls in a goroutine of its own, so that the answer comes in time even when
// the call does not heed its context. It is not waited for then: a call that is
// stuck in the kernel cannot be ended.
func (s *server) run(ctx context.Context, c call, body []byte) (any, error) {
	// The caller's going away must not stop a call half way: Docker does not ask
	// again.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), s.limit)
	defer cancel()
	type result struct {
		reply any
		err   error
	}
	done := make(chan result, 1)
	go func() {
		inner, cancel := context.WithTimeout(ctx, s.limit-min(answerMargin, s.limit/10))
		defer cancel()
		// Ends before the answer goes out, and not before the call does.
		end := s.journal.begin(c.method, body)
		defer func() {
			end()
			if p := recover(); p != nil {
				s.log.Error("call panicked", "method", c.method, "panic", fmt.Sprint(p), "stack", string(debug.Stack()))
				done <- result{err: fmt.Errorf("internal error in %s: %v; see the log of dockerd, and please report it", c.method, p)}
			}
		}()
		reply, err := c.serve(inner, s.gate, body)
		end()
		done <- result{reply, err}
	}()
	select {
	case r := <-done:
		return r.reply, r.err
	case <-ctx.Done():
		s.log.Error("call is stuck", "method", c.method, "goroutines", goroutines())
		_, stage, _ := s.gate.peek()
		return nil, fmt.Errorf("no answer within %s: %s is still at work (weft is %s); it may finish later", s.limit, c.method, stage)
	}
}

// goroutines returns the stacks of all goroutines, at most 64 KiB.
func goroutines() string {
	buf := make([]byte, 64<<10)
	return string(buf[:runtime.Stack(buf, true)])
}

// readBody returns the request's body, or a *requestError. An empty body is how
// Docker repeats a request when the plugin died in the middle of it: an error lets
// the container's start fail cleanly, while success would let it go on.
func readBody(c call, w http.ResponseWriter, r *http.Request) ([]byte, error) {
	if r.Method != http.MethodPost {
		return nil, &requestError{http.StatusMethodNotAllowed, fmt.Sprintf("%s wants POST, not %.20q", c.method, r.Method)}
	}
	body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, bodyLimit))
	var tooLarge *http.MaxBytesError
	switch {
	case errors.As(err, &tooLarge):
		return nil, &requestError{http.StatusRequestEntityTooLarge, fmt.Sprintf("%s: request is larger than %d bytes", c.method, bodyLimit)}
	case err != nil:
		return nil, &requestError{http.StatusBadRequest, fmt.Sprintf("%s: request ended early: %v", c.method, err)}
	case len(body) == 0 && !c.noBody:
		return nil, &requestError{http.StatusInternalServerError,
			c.method + ": request is empty, probably repeated after the plugin was interrupted; nothing was changed, try again"}
	}
	return body, nil
}

// decode reads a request. Unknown fields are accepted: newer engines send more.
func decode[Req any](method string, body []byte) (Req, error) {
	var req Req
	bad := func(format string, args ...any) (Req, error) {
		return req, &requestError{http.StatusBadRequest, method + ": " + fmt.Sprintf(format, args...)}
	}
	trimmed := strings.TrimLeft(string(body[:min(len(body), 64)]), " \t\r\n")
	if !strings.HasPrefix(trimmed, "{") {
		return bad("request is not a JSON object")
	}
	err := json.Unmarshal(body, &req)
	var wrong *json.UnmarshalTypeError
	var syntax *json.SyntaxError
	switch {
	case errors.As(err, &wrong):
		return bad("field %s: got %s, want %s", wrong.Field, wrong.Value, jsonKind(wrong.Type.Kind().String()))
	case errors.As(err, &syntax):
		return bad("request is not valid JSON at byte %d: %v", syntax.Offset, err)
	case err != nil:
		return bad("request cannot be read: %v", err)
	}
	return req, nil
}

// jsonKind returns JSON's word for a kind of Go.
func jsonKind(kind string) string {
	switch kind {
	case "struct", "map", "ptr":
		return "object"
	case "slice", "array":
		return "array"
	case "bool", "string":
		return kind
	}
	return "number"
}

// requestID returns the ids in a request, shortened, for the log.
func requestID(body []byte) string {
	var ids struct{ NetworkID, EndpointID, PoolID, Address string }
	_ = json.Unmarshal(body, &ids) // what cannot be read stays empty
	var parts []string
	for _, id := range []string{ids.NetworkID, ids.EndpointID} {
		if id != "" {
			parts = append(parts, id[:min(len(id), 12)])
		}
	}
	for _, id := range []string{ids.PoolID, ids.Address} {
		if id != "" {
			parts = append(parts, id[:min(len(id), 60)])
		}
	}
	return strings.Join(parts, " ")
}

func writeJSON(w http.ResponseWriter, status int, v any) {
	raw, err := json.Marshal(v)
	if err != nil {
		status, raw = http.StatusInternalServerError, []byte(`{"Err":"answer cannot be written as JSON","Error":"answer cannot be written as JSON"}`)
	}
	w.Header().Set("Content-Type", contentType)
	w.WriteHeader(status)
	_, _ = w.Write(append(raw, '\n')) // a caller that went away is no fault of ours
}

// openSockets opens Docker's socket and the admin socket in a folder, or takes over
// those that the parent has opened.
func openSockets(dir string, inherit bool) (docker, admin net.Listener, err error) {
	if inherit {
		docker, err = net.FileListener(os.NewFile(3, dockerSocket))
		if err == nil {
			admin, err = net.FileListener(os.NewFile(4, adminSocket))
		}
		return docker, admin, err
	}
	if docker, err = listenUnix(filepath.Join(dir, dockerSocket)); err != nil {
		return nil, nil, err
	}
	if admin, err = listenUnix(filepath.Join(dir, adminSocket)); err != nil {
		return nil, nil, errors.Join(err, docker.Close())
	}
	return docker, admin, nil
}

// listenUnix opens a Unix socket that root alone may use, in place of one that an
// earlier process left.
func listenUnix(path string) (net.Listener, error) {
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return nil, err
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, err
	}
	l, err := net.Listen("unix", path)
	if err != nil {
		return nil, err
	}
	return l, os.Chmod(path, 0o600)
}

// serveHTTP serves until ctx ends, then lets calls in flight finish for at most
// drainLimit.
func serveHTTP(ctx context.Context, l net.Listener, h http.Handler, log *slog.Logger) error {
	srv := &http.Server{
		Handler:           h,
		ReadHeaderTimeout: readLimit,
		ReadTimeout:       readLimit,
		IdleTimeout:       2 * time.Minute,
		MaxHeaderBytes:    16 << 10,
		ErrorLog:          slog.NewLogLogger(log.Handler(), slog.LevelDebug),
	}
	ended := make(chan error, 1)
	go func() { ended <- srv.Serve(l) }()
	select {
	case err := <-ended:
		return err
	case <-ctx.Done():
	}
	drain, cancel := context.WithTimeout(context.WithoutCancel(ctx), drainLimit)
	defer cancel()
	if err := srv.Shutdown(drain); err != nil {
		log.Error("calls in flight were cut off", "after", drainLimit)
		return srv.Close()
	}
	return nil
}
